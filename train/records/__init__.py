"""What a training run leaves: numbers, rollouts token by token, curves, the microscope's looks."""
