"""Training a model with Neural Attention beside the stock one: arms, data, runs, and reports on them."""
