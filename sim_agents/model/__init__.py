"""The next-token network, its attention between road users, and sampling from it."""
