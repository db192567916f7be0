"""What tests share: independent references, models, ranks, commands, cases."""
