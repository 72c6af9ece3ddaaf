"""Whole training steps: ours and the peers', their arithmetic, and where the time goes (``mmoe bench step``)."""
