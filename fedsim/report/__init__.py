"""What people see of a run: tables for the terminal, figures for papers."""
