"""PDM-Closed, the rule-based planner that the PDM score measures progress against."""
