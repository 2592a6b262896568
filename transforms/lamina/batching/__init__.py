"""`vmap`: map a function over a batch dim by rewriting each op as its batched form."""
