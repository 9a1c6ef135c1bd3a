"""Random programs around optimizers: drawn, run eagerly and compiled side by side, and shrunk where they differ."""
