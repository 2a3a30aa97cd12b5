"""What people see: the first screen, tables and, later, pictures."""
