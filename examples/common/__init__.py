"""What the examples share; each file is one idea."""
