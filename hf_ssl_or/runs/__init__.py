"""What a run leaves behind: the files of its folder, its typed results, the names of its measures, and one reader."""
