"""Fine-tuning with NeMo-Aligner 0.7.0 (on nemo_toolkit 2.4.1): its models and trainers, fed and read here."""
