"""The models and everything they need in plain PyTorch.

This folder is flat on purpose: its files import nothing but torch, transformers, what transformers itself needs and each
other as siblings, so they can be copied as they are into a repository on the Hub and run there without this package. What
else they use, they look for first.
"""
