"""What the operators cost beside their peers and this machine's ceilings; run by ``mmoe bench`` from a checkout."""
