"""From grades and texts to scores, intervals, winners and figures that need no judge."""
