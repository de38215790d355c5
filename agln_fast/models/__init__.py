"""The reference networks: plain PyTorch that reads like the paper."""
