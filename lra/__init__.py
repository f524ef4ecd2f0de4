"""The Long Range Arena with pretraining: tasks, training, comparison and report. The command is `lra`."""
