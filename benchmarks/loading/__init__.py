"""What `mmoe bench data` times: one file a side."""
