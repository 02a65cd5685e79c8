"""Killing, damaging and misfeeding Pare on purpose: does anything get lost, or come out wrong without a word?"""
