"""One table of parameter names for each family of models."""
