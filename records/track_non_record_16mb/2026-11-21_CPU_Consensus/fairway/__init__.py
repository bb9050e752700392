"""What is done with an artifact of train_gpt: scoring, experts, correction, certificate."""
