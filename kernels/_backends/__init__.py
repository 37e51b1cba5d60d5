"""What an implementation in each technology asks of the machine, and how it launches."""
