"""Match: find the known kernel that computes a group, by symbolic algebra. Only this room uses sympy."""
