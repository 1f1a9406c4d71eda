"""What people read of a conversion: its model card, its report, their pictures and tables."""
