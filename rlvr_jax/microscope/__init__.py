"""Two checkpoints, token by token: what a base model and its RL-trained form give every token of a response."""
