"""Whole training steps: ours and the peers', their floating-point work, and where the time goes (``mmoe bench step``)."""
