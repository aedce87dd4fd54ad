"""The callbacks of every run; `conf/callbacks` adds others."""
