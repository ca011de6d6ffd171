"""References in NumPy, float64: the plainest program for each form of each method."""
