"""One trainer step: rollouts, graded groups, the objective, packed rows, the update, evaluation."""
