"""`python -m lamina.doctor`: whether Lamina is right on the torch and the devices that are here."""
