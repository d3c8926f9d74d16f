"""What being guarded costs: against the bare network, as networks grow, and on a GPU."""
