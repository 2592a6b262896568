"""What is built with `lamina.extend` alone."""
