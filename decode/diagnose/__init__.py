"""`python -m decode diagnose`: what the update did to every token of given responses."""
