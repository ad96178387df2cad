"""What people read: figures, the report, tables of README and results, the terminal."""
