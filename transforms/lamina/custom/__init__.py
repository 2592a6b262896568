"""Functions whose derivative or batched form the user gives."""
