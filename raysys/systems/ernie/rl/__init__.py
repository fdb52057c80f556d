"""Unified multimodal reinforcement learning (ERNIE 5.0, section 4): objectives, replay buffer, hints, rollouts, learner."""
