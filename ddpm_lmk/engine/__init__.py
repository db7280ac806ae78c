"""Training: one loop for every task, and what it needs."""
