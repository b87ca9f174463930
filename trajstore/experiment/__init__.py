"""What is to be recorded, as plain data and as declarations."""
