"""Which known kernel computes a group: symbolic algebra over its formula. The only room that uses sympy."""
