"""The stack of one machine: started, examined, shown in a demonstration."""
