"""torch.optim's own classes as update rules: their step without Dynamo, on their own groups and states."""
