"""What the stages hand to each other: leaves, expressions, updates, formulas, groups, and their interpreter."""
