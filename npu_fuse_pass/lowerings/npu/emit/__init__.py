"""From a group's formula to operations: elementwise, of lists of tensors, dedicated ones."""
