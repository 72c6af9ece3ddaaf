"""What `mmoe bench ablations` compares, and how it is told."""
