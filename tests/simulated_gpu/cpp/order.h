// Streams and events as vector clocks: an access that no event orders is a race, whatever the real timing would be.
#pragma once
#include "state.h"

// A new time of stream s, after all that the host has waited for.
void tick(int s) {
  for (int i = 0; i < CLOCKS; i++) clock_of[s][i] = std::max(clock_of[s][i], host[i]);
  clock_of[s][s]++;
}

void join(Clock& into, const Clock& from) {
  for (int i = 0; i < CLOCKS; i++) into[i] = std::max(into[i], from[i]);
}

void race(std::string found) {
  if (races.size() < 200) races.push_back(std::move(found));
}

bool before(const Access& a, const Clock& now) {
  return a.stream < 0 || now[a.stream] >= a.at;
}

std::string named(const Access& a) {
  return a.by + " (stream " + std::to_string(a.stream) + ")";
}

// An operator on stream s reads or writes the storage at `base`.
void access(void* base, bool write, int s, const std::string& by) {
  if (!base) return;
  Bytes& b = bytes_at[base];
  if (!before(b.wrote, clock_of[s])) race(by + " (stream " + std::to_string(s) + ") not ordered after write by " + named(b.wrote));
  if (!write) {
    b.read[s] = {s, clock_of[s][s], by};
    return;
  }
  for (auto& [t, a] : b.read)
    if (!before(a, clock_of[s])) race(by + " (stream " + std::to_string(s) + ") writes what " + named(a) + " may still read");
  b.read.clear();
  b.wrote = {s, clock_of[s][s], by};
}

// The host reads or writes memory that copies may be using.
void host_access(void* base, bool write, const std::string& by) {
  auto it = bytes_at.find(base);
  if (it == bytes_at.end()) return;
  if (!before(it->second.wrote, host)) race("host's " + by + " while " + named(it->second.wrote) + " may write");
  if (write)
    for (auto& [t, a] : it->second.read)
      if (!before(a, host)) race("host's " + by + " while " + named(a) + " may read");
}

// The caching allocator gives freed memory to its own stream again at once: no other stream may still use it.
void freed(void* base) {
  auto it = bytes_at.find(base);
  if (it == bytes_at.end()) return;
  Bytes& b = it->second;
  Clock now = clock_of[b.stream];
  join(now, host);
  auto check = [&](const Access& a, const char* how) {
    if (a.stream != b.stream && !before(a, now) && !b.recorded.count(a.stream))
      race(std::string("memory of ") + b.by + " is freed while " + named(a) + how);
  };
  check(b.wrote, " may write");
  for (auto& [t, a] : b.read) check(a, " may read");
  bytes_at.erase(it);
}

void host_waits(int s) {
  join(host, clock_of[s]);
}
