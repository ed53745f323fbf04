"""What a box may reach on the network: names, addresses, rules and the decision, without any I/O."""
