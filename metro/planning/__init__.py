"""Memory of training and using a model of any size: `metro.plan` and `metro plan`."""
