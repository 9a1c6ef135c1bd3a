"""Update rules of known algorithms, each written once: for the classes in `optimizers` and for torch.optim's own."""
