"""What `lamina.extend` hands out."""
