"""From a group's formula to GE operations: elementwise, on lists of tensors, dedicated."""
