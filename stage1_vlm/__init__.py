"""stage1_vlm package."""
