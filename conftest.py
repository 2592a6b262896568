"""What holds for all tests, those in docstrings included; read before Lamina is imported."""

import os

# A rule whose op is not as the record has it fails the tests instead of being left out.
os.environ.setdefault("LAMINA_SCHEMAS", "error")
