"""The slow, obvious algorithms that fast ones are held against."""
