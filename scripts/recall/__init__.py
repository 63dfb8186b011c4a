"""What the recall experiments share: training, the rival, tables."""
